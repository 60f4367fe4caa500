//! Emits the notes of sources and configs, which are strings, as events.

/// Emits a note as a warning if it begins with `warning: `, otherwise as information.
pub(crate) fn emit(note: &str) {
    match note.strip_prefix("warning: ") {
        Some(warning) => tracing::warn!("{warning}"),
        None => tracing::info!("{note}"),
    }
}
