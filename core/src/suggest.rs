//! Suggestions for misspelt names.

/// Returns the known name that is nearest to `found`; `None` if none is near. Ignores case, hyphens and underscores.
pub fn nearest<'a>(found: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |name: &str| name.to_lowercase().replace(['-', ' '], "_");
    let squeezed = |name: &str| plain(name).replace('_', "");
    known
        .into_iter()
        .map(|name| {
            let score =
                if squeezed(name) == squeezed(found) { 1.0 } else { strsim::jaro_winkler(&plain(found), &plain(name)) };
            (score, name)
        })
        .filter(|(score, _)| *score >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_ignores_case_and_underscores_and_tolerates_typos() {
        let known = ["top_k", "batch_top_k", "standard"];
        for (found, near) in
            [("topk", Some("top_k")), ("TopK", Some("top_k")), ("standart", Some("standard")), ("x", None)]
        {
            assert_eq!(nearest(found, known), near, "{found}");
        }
    }
}
