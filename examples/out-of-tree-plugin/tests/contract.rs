//! The contract of every component: its example runs, it learns, it resumes bit for bit, ...

use dictlearn as _;
use dictlearn::contract::keep;
use dictlearn_core::registry::ComponentKind;
use out_of_tree_plugin as _;

#[test]
fn it_keeps_the_contract() {
    keep(ComponentKind::Trainer, "tanh");
}
