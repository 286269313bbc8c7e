#!/usr/bin/env bash
# What signals do to a run: Ctrl-C, Ctrl-C twice, a closed terminal, Ctrl-Z and fg, and SIGTERM to the launcher, to one
# rank and to the group, under `regatta train`, `regatta launch`, torchrun and mpirun. Each case so many times as is said
# (1), in a real terminal: how the run ended, its exit code, and whether going on from the checkpoint gives the bits of a
# run that nothing disturbed. Fails where anything is not as docs/jobs.md says.
#
#   benches/signals.sh [TIMES] [LAUNCHER]      # LAUNCHER: train, launch, torchrun or mpirun; all of them
#
# torchrun is taken from the Python that REGATTA_PYTHON names.
set -euo pipefail
cd "$(dirname "$0")/.."
export REGATTA_SIGNALS_ROUNDS=${1:-1}
# One case at a time: they share the machine's cores.
exec cargo test --release --workspace --test signals -- --nocapture --test-threads 1 "${2:-}"
