#!/usr/bin/env bash
# The memory that threads share, under ThreadSanitizer: fails on a race. About two minutes, most of it building.
# usage: benches/tsan.sh   (Linux on x86-64; any stable toolchain)
set -euo pipefail
cd "$(dirname "$0")/.."
suppressions=$(mktemp)
trap 'rm -f "$suppressions"' EXIT
# std itself is not instrumented, so what it orders by means of its own goes unseen:
cat > "$suppressions" <<'S2'
# the fence before the last reference of an Arc is dropped,
race:alloc::sync::Arc<*as core::ops::drop::Drop>::drop
race:alloc::sync::Weak<*as core::ops::drop::Drop>::drop
# the slow path of the Mutex around the set of ranks that have left,
race:alloc::collections::btree::
# the same of the Mutex around what ranks say they wait for, which they do on a busy machine,
race:regatta_comm::member::waits::Waits
# and the channel of the test harness.
race:test::event::
race:test::run_tests
S2
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer"
export TSAN_OPTIONS="suppressions=$suppressions halt_on_error=0 exitcode=66 ${TSAN_OPTIONS:-}"
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/tsan \
  cargo test --target x86_64-unknown-linux-gnu -p regatta-comm --test races -- --test-threads=1
