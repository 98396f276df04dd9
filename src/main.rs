//! The command line: parse, dispatch, print the error chain, exit.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
