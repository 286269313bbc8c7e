//! The `regatta` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    regatta_cli::main()
}
