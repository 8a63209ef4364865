//! Whether a page of another site asks.
//!
//! Such a page cannot read our answers, but it can hold our event streams, and any page that somebody here has open can try. Browsers
//! say who asks: in `Sec-Fetch-Site` where they trust the address, in `Origin` elsewhere. Programs say neither and are answered.

use axum::http::{HeaderMap, header, uri::Uri};

use super::hosts::AllowedHosts;

/// Whether these are the headers of a request that another site's page makes in the background. Somebody who follows a link to this
/// server is no such request.
pub(super) fn is_foreign(headers: &HeaderMap, host: &str, hosts: &AllowedHosts) -> bool {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    if let Some(site) = text("sec-fetch-site") {
        let follows_link = text("sec-fetch-mode") == Some("navigate") && text("sec-fetch-dest") == Some("document");
        return !matches!(site, "same-origin" | "none") && !follows_link;
    }
    let Some(origin) = text(header::ORIGIN.as_str()) else { return false };
    let Some(origin) = origin.parse::<Uri>().ok().and_then(|origin| origin.authority().cloned()) else { return true };
    // A proxy may have put its own name for us into `Host`; then the page's name must be one that was configured.
    !origin.as_str().eq_ignore_ascii_case(host) && !hosts.is_configured(origin.host())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_other_sites_are_told_from_programs_links_and_our_own() {
        let hosts = AllowedHosts::bound_to(([127, 0, 0, 1], 8080).into()).and(["grok.example"]);
        let cases: &[(&[(&str, &str)], bool)] = &[
            (&[], false),
            (&[("sec-fetch-site", "none")], false),
            (&[("sec-fetch-site", "same-origin")], false),
            (&[("sec-fetch-site", "same-origin"), ("origin", "https://grok.example")], false),
            (&[("sec-fetch-site", "same-site")], true),
            (&[("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image")], true),
            (&[("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")], true),
            (
                &[("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")],
                false,
            ),
            (&[("sec-fetch-site", "\u{fc}")], true),
            (&[("origin", "http://localhost:8080")], false),
            (&[("origin", "http://LOCALHOST:8080")], false),
            (&[("origin", "http://localhost:3000")], true),
            (&[("origin", "https://evil.example")], true),
            (&[("origin", "https://grok.example")], false),
            (&[("origin", "null")], true),
            (&[("origin", "")], true),
        ];
        for (pairs, expected) in cases {
            let headers: HeaderMap =
                pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
            assert_eq!(is_foreign(&headers, "localhost:8080", &hosts), *expected, "{pairs:?}");
        }
    }
}
