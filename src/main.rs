//! The program `dictlearn`: core's command line with every bundled plugin.

use dictlearn as _;

fn main() -> std::process::ExitCode {
    dictlearn_core::cli::main()
}
