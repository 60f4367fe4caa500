//! Where libtorch is: cargo-fuzz sets flags of its own in place of those in libtorch.toml.

fn main() {
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        println!("cargo::rustc-link-arg-bins=-Wl,-rpath,{libtorch}/lib");
    }
}
