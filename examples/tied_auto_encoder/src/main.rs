//! dictlearn with this plugin: `cargo run -p tied_auto_encoder -- train examples/tied_auto_encoder/config.yaml`.

use dictlearn as _;
use tied_auto_encoder as _;

fn main() -> std::process::ExitCode {
    dictlearn_core::cli::main()
}
