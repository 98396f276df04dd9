//! What deny.toml says of dependencies holds: licences, banned crates, where they come from.
//! `cargo deny` says the same, with more words, in `make lint`.

// Helpers outside of #[test] functions fail a test by panicking too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// All packages that are built in, with any feature on any machine.
fn packages() -> Vec<Value> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["metadata", "--format-version=1", "--locked", "--all-features"]);
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = std::mem::take(&mut metadata["packages"]);
    let Value::Array(packages) = packages else { panic!("no list of packages") };
    assert!(packages.len() > 50, "only {} packages", packages.len());
    packages
}

/// A list of strings of deny.toml.
fn list(section: &str, key: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deny.toml");
    let text = std::fs::read_to_string(path).unwrap();
    let text: String = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| format!("{line}\n"))
        .collect();
    let (_, rest) = text.split_once(&format!("[{section}]\n")).unwrap();
    let section = rest.split("\n[").next().unwrap();
    let (_, rest) = section.split_once(&format!("{key} = [")).unwrap();
    let (items, _) = rest.split_once(']').unwrap();
    let items: Vec<_> = items.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    assert!(!items.is_empty(), "{section}");
    items
}

/// Whether an SPDX expression is allowed. "AND" binds more than "OR"; of parentheses there are
/// only such as hold an "OR".
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.replace('/', " OR ").replace("  ", " ");
    let mut rest = expression.as_str();
    let mut replaced = String::new();
    while let Some((before, after)) = rest.split_once('(') {
        let (inner, after) = after.split_once(')').expect("a parenthesis without end");
        let verdict = if is_allowed(inner, allowed) { "yes" } else { "no" };
        replaced.push_str(before);
        replaced.push_str(verdict);
        rest = after;
    }
    replaced.push_str(rest);
    let is_one_allowed = |licence: &str| licence == "yes" || allowed.iter().any(|a| a == licence);
    replaced.split(" OR ").any(|all| all.split(" AND ").all(|one| is_one_allowed(one.trim())))
}

#[test]
fn every_licence_is_one_that_is_allowed() {
    let allowed = list("licenses", "allow");
    for package in packages() {
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(is_allowed(licence, &allowed), "{}: {licence}", package["name"]);
    }
    assert!(!is_allowed("GPL-3.0-only", &allowed));
    assert!(!is_allowed("MIT AND GPL-3.0-only", &allowed));
    assert!(!is_allowed("(MIT OR Zlib) AND GPL-3.0-only", &allowed));
    assert!(is_allowed("(GPL-3.0-only OR Zlib) AND MIT", &allowed));
    assert!(is_allowed("GPL-3.0-only/MIT", &allowed));
}

#[test]
fn no_banned_crate_is_built_in_and_each_has_a_version_and_comes_from_the_registry() {
    let (banned, registries) = (list("bans", "deny"), list("sources", "allow-registry"));
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        assert!(!banned.iter().any(|banned| banned == name), "{name} is banned");
        for dependency in package["dependencies"].as_array().unwrap() {
            let is_our_own = package["source"].is_null();
            assert!(!is_our_own || dependency["req"] != "*", "{dependency}");
        }
        match package["source"].as_str() {
            None => assert_eq!(name, "imgdm"),
            Some(source) => {
                let known = registries.iter().any(|r| source == format!("registry+{r}"));
                assert!(known, "{name} comes from {source}");
            }
        }
    }
}
