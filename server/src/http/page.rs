//! The page at `/`: three files that `server/ui` is built to, part of the binary. They tell nothing by themselves, so anyone may
//! load them; what they show comes from `/api`, with the credentials that are typed in where the node asks for some.

use axum::http::{HeaderName, header};
use axum::response::IntoResponse;

const HTML: &str = include_str!("../../ui/dist/index.html");
const SCRIPT: &str = include_str!("../../ui/dist/page.js");
const STYLE: &str = include_str!("../../ui/dist/page.css");

/// Nothing from elsewhere, nowhere else to send anything, in nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) async fn html() -> impl IntoResponse {
    file("text/html; charset=utf-8", HTML)
}

pub(super) async fn script() -> impl IntoResponse {
    file("text/javascript; charset=utf-8", SCRIPT)
}

pub(super) async fn style() -> impl IntoResponse {
    file("text/css; charset=utf-8", STYLE)
}

fn file(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, kind),
        // Another build has other files under the same names.
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_those_that_the_page_names_and_load_nothing_from_elsewhere() {
        assert!(HTML.contains("./page.js") && HTML.contains("./page.css"));
        for text in [HTML, SCRIPT, STYLE] {
            let links = text.match_indices("http").map(|(at, _)| &text[at..(at + 30).min(text.len())]);
            let foreign: Vec<&str> =
                links.filter(|link| link.contains("://") && !link.contains("www.w3.org")).collect();
            assert!(foreign.is_empty(), "{foreign:?}");
        }
    }
}
