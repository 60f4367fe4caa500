//! dictlearn
fn main() {}
