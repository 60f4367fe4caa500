//! Notes of sources and configs, which are texts, as events.

/// Emits a note: a warning if it begins with `warning: `, otherwise information.
pub(crate) fn emit(note: &str) {
    match note.strip_prefix("warning: ") {
        Some(warning) => tracing::warn!("{warning}"),
        None => tracing::info!("{note}"),
    }
}
