//! dictlearn with this plugin linked in.

// Linking a plugin registers it.
use dictlearn as _;
use dictlearn_process as _;
use out_of_tree_plugin as _;

fn main() -> std::process::ExitCode {
    dictlearn::cli::main()
}
