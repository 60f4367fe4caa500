//! dictlearn with this plugin: `cargo run --release -- train CONFIG.yaml`.

// Linking a plugin registers it.
use dictlearn as _;
use dictlearn_process as _;
use example_name as _;

fn main() -> std::process::ExitCode {
    dictlearn::cli::main()
}
