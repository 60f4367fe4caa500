//! The program `dictlearn`: core's command line with every bundled plugin.

fn main() -> std::process::ExitCode {
    dictlearn::cli::main()
}
