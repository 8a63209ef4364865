//! The files of the health page, part of the program, so that the page always fits the server that shows it.

use axum::{Router, http::HeaderMap, routing::get};

use super::{HttpState, cluster::tagged};

/// Path, content type, content.
pub(super) const ASSETS: [(&str, &str, &str); 6] = [
    ("/", "text/html; charset=utf-8", include_str!("../dashboard/index.html")),
    ("/app.js", "text/javascript; charset=utf-8", include_str!("../dashboard/app.js")),
    ("/view.js", "text/javascript; charset=utf-8", include_str!("../dashboard/view.js")),
    ("/format.js", "text/javascript; charset=utf-8", include_str!("../dashboard/format.js")),
    ("/style.css", "text/css; charset=utf-8", include_str!("../dashboard/style.css")),
    ("/favicon.svg", "image/svg+xml", include_str!("../dashboard/favicon.svg")),
];

pub(super) fn routes() -> Router<HttpState> {
    ASSETS.into_iter().fold(Router::new(), |router, (path, content_type, content)| {
        router.route(path, get(async move |headers: HeaderMap| tagged(&headers, content_type, content)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_stays_small_and_at_home() {
        let bytes: usize = ASSETS.iter().map(|(_, _, content)| content.len()).sum();
        assert!(bytes <= 60 * 1024, "expected at most 60 KiB of assets, found {bytes}");
        for (path, _, content) in ASSETS {
            // The SVG namespace is only a name; it is never fetched.
            let foreign = content.replace("http://www.w3.org/2000/svg", "");
            assert!(!foreign.contains("http:") && !foreign.contains("https:"), "{path} names a foreign address");
            for risky in
                ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " style=", "<style"]
            {
                assert!(!content.contains(risky), "{path} contains {risky}");
            }
        }
    }

    #[test]
    fn every_file_that_the_page_names_is_served() {
        let named = |content: &str, before: &str| -> Vec<String> {
            content.split(before).skip(1).filter_map(|rest| rest.split('"').next()).map(str::to_owned).collect()
        };
        for (_, _, content) in ASSETS {
            let files = ["src=\"", "rel=\"stylesheet\" href=\"", "type=\"image/svg+xml\" href=\"", "from \"."];
            for file in files.iter().flat_map(|before| named(content, before)) {
                assert!(ASSETS.iter().any(|(path, _, _)| *path == file), "{file} is not served");
            }
        }
    }
}
