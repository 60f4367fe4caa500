//! The program `dictlearn`: the command line with every bundled plugin.

use dictlearn_process as _;

fn main() -> std::process::ExitCode {
    dictlearn::cli::main()
}
