//! What every component keeps: its example runs, it learns, it resumes bit for bit, ...

use dictlearn as _;
use dictlearn::contract::keep;
use dictlearn_core::registry::Kind;
use example_name as _;

#[test]
fn it_keeps_the_contract() {
    keep(Kind::EXAMPLE_KIND, "example_name");
}
