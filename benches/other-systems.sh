#!/usr/bin/env bash
# What can be checked on Linux of other systems: that regatta-comm, regatta-kernel and regatta-plan compile for macOS and
# Windows without a warning, and that the tests of regatta-comm's and regatta-kernel's libraries pass on aarch64, emulated.
# What cannot be had here is skipped, and that is said.
set -euo pipefail
cd "$(dirname "$0")/.."

has_target() {
  rustup target list --installed 2>/dev/null | grep -qx "$1" || rustup target add "$1" >/dev/null 2>&1 || {
    echo "skipped: rustup cannot add the target $1"
    return 1
  }
}

# Nothing is linked by a check, so the C parts of dependencies need not be compiled: this makes the files that a compiler and
# an archiver would make, empty.
stub=$(mktemp)
trap 'rm -f "$stub"' EXIT
cat >"$stub" <<'EOF'
#!/bin/sh
last=
for word; do
  case $last in -o | cq | cqD | qc) : >"$word" ;; esac
  case $word in -Fo*) : >"${word#-Fo}" ;; -out:*) : >"${word#-out:}" ;; esac
  last=$word
done
EOF
chmod +x "$stub"
for target in aarch64-apple-darwin x86_64-pc-windows-msvc x86_64-pc-windows-gnu; do
  has_target "$target" || continue
  echo "check: $target"
  env "CC_${target//-/_}=$stub" "AR_${target//-/_}=$stub" RUSTFLAGS="-D warnings" \
    cargo check --target "$target" -p regatta-comm -p regatta-kernel -p regatta-plan
done

target=aarch64-unknown-linux-gnu
root=/usr/aarch64-linux-gnu
if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-gcc >/dev/null; then
  echo "skipped: the tests of $target need qemu-aarch64 and aarch64-linux-gnu-gcc (Debian: apt-get install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross)"
elif has_target "$target"; then
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
  export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L $root"
  cargo test --release --target "$target" -p regatta-comm -p regatta-kernel --lib "$@"
fi
