//! Tells the linker where libtorch is: cargo-fuzz replaces the flags of libtorch.toml with its own.

fn main() {
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        println!("cargo::rustc-link-arg-bins=-Wl,-rpath,{libtorch}/lib");
    }
}
