//! Suggestions for misspelt names.

/// Returns the known name that is nearest to `found`; `None` if none is near. Ignores case, hyphens and underscores.
/// Suggests initials: `lr` for `learning_rate`.
pub fn nearest<'a>(found: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |name: &str| name.to_lowercase().replace(['-', ' '], "_");
    let squeezed = |name: &str| plain(name).replace('_', "");
    let initials = |name: &str| match plain(name).split('_').filter_map(|word| word.chars().next()).collect::<String>()
    {
        one if one.len() < 2 => None,
        initials => Some(initials),
    };
    let abbreviates = |short: &str, long: &str| initials(long).is_some_and(|initials| initials == plain(short));
    known
        .into_iter()
        .map(|name| {
            let score = if squeezed(name) == squeezed(found) {
                1.0
            } else if abbreviates(name, found) || abbreviates(found, name) {
                0.99
            } else {
                strsim::jaro_winkler(&plain(found), &plain(name))
            };
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
        let known = ["top_k", "batch_top_k", "standard", "lr"];
        for (found, near) in [
            ("topk", Some("top_k")),
            ("TopK", Some("top_k")),
            ("standart", Some("standard")),
            ("x", None),
            ("learning_rate", Some("lr")),
        ] {
            assert_eq!(nearest(found, known), near, "{found}");
        }
    }
}
