//! Text that a plugin ships.
