//! Where the machine's apt has packages from, as lines of a sources.list for the new system.

use super::RecipeError;
use crate::apt::Apt;
use crate::catalogue::Recipe;
use crate::{ImageError, Programs, Progress};
use std::path::Path;

/// What is asked of apt about each of its lists, one line each.
const FIELDS: &str = "$(ORIGIN)\t$(REPO_URI)\t$(RELEASE)\t$(CODENAME)\t$(COMPONENT)";
/// The parts of a distribution that a system gets packages from: others are not free software,
/// or for other purposes.
const COMPONENT: &str = "main";
/// Settings that belong to where and how packages are fetched. What else the machine's apt is
/// set to is the machine's own matter.
const SETTINGS: [&str; 4] =
    ["Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries"];

/// Where packages come from.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sources {
    /// Lines of sources.list(5). None where the machine has another distribution: mmdebstrap
    /// knows where Debian is.
    pub lines: Vec<String>,
    /// Settings of apt.conf(5).
    pub options: Vec<String>,
}

/// One of apt's lists.
struct Listed<'a> {
    uri: &'a str,
    release: &'a str,
    codename: &'a str,
}

/// The machine's sources of a recipe's distribution, for the recipe's suite.
pub(super) fn of(
    programs: &Programs,
    recipe: &Recipe,
    progress: &mut dyn Progress,
) -> Result<Sources, RecipeError> {
    if !Path::new(&recipe.keyring).exists() {
        return Err(RecipeError::NoKeyring {
            distribution: recipe.distribution.clone(),
            keyring: recipe.keyring.clone(),
        });
    }
    let apt = Apt::new(programs);
    // Only its lists say whose packages a place has.
    let has_lists = apt.has_lists().map_err(|error| match error {
        // mmdebstrap brings it along.
        ImageError::NoProgram { .. } => RecipeError::NoMmdebstrap,
        error => error.into(),
    })?;
    if !has_lists {
        apt.refresh(progress)?;
    }
    let arguments = ["indextargets", "--format", FIELDS, "Created-By: Packages"];
    let lists = programs.output("apt-get", &arguments)?.stdout;
    let settings = programs.output("apt-config", &["dump"])?.stdout;
    Ok(Sources {
        lines: lines(&String::from_utf8_lossy(&lists), recipe),
        options: options(&String::from_utf8_lossy(&settings)),
    })
}

/// The lines for the recipe's suite: the machine's own where it has that suite, or else those of
/// another suite of the same distribution with the name replaced, as mirrors carry them all.
fn lines(lists: &str, recipe: &Recipe) -> Vec<String> {
    let all: Vec<Listed<'_>> = lists.lines().filter_map(|line| parse(line, recipe)).collect();
    let base = |listed: &&Listed<'_>| !listed.codename.contains('-');
    let Some(present) = all
        .iter()
        .filter(base)
        .find(|listed| listed.codename == recipe.suite)
        .or_else(|| all.iter().find(base))
    else {
        return Vec::new();
    };
    let mut lines = Vec::new();
    for listed in &all {
        // `bookworm`, `bookworm-updates`, `bookworm-security`; `stable` where a source says so.
        let rest = listed.codename.strip_prefix(present.codename);
        let Some(rest) = rest.filter(|rest| rest.is_empty() || rest.starts_with('-')) else {
            continue;
        };
        let suite = format!("{}{rest}", recipe.suite);
        let key = &recipe.keyring;
        let line = format!("deb [signed-by={key}] {} {suite} {COMPONENT}", listed.uri);
        if !lines.contains(&line) && listed.release != "./" {
            lines.push(line);
        }
    }
    lines
}

fn parse<'a>(line: &'a str, recipe: &Recipe) -> Option<Listed<'a>> {
    let mut fields = line.split('\t');
    let mut next = || fields.next();
    let (origin, uri, release, codename, component) = (next()?, next()?, next()?, next()?, next()?);
    let fits = origin == recipe.distribution
        && component == COMPONENT
        // Only what mmdebstrap can take as one word of a line.
        && !uri.contains(char::is_whitespace)
        // A folder of this machine would not be there in the new system.
        && ["http:", "https:"].iter().any(|kind| uri.starts_with(kind));
    fits.then_some(Listed { uri, release, codename })
}

/// The settings of `apt-config dump` that the new system's apt needs too, to fetch as the
/// machine's does.
fn options(dump: &str) -> Vec<String> {
    let wanted = |line: &&str| SETTINGS.iter().any(|setting| line.starts_with(setting));
    let set = |line: &&str| !line.ends_with(" \"\";");
    let mut options: Vec<String> = dump
        .lines()
        .filter(wanted)
        .filter(set)
        .map(|line| line.trim_end_matches(';').to_owned())
        .collect();
    options.push("Acquire::Languages \"none\"".to_owned());
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTS: &str = "Debian\thttp://m/debian/\tbookworm\tbookworm\tmain\n\
        Debian\thttp://m/debian/\tbookworm\tbookworm\tcontrib\n\
        Debian\thttp://m/debian/\tbookworm-updates\tbookworm-updates\tmain\n\
        Debian\thttp://m/security/\tbookworm-security\tbookworm-security\tmain\n\
        Other\thttps://o/x\tnodistro\tnodistro\tmain\n";

    fn recipe(distribution: &str, suite: &str) -> Recipe {
        Recipe {
            distribution: distribution.into(),
            suite: suite.into(),
            keyring: "/k".into(),
            kernel: "linux".into(),
            packages: Vec::new(),
            size: 2 << 30,
        }
    }

    #[test]
    fn the_machines_own_sources_of_the_suite_are_taken() {
        assert_eq!(
            lines(LISTS, &recipe("Debian", "bookworm")),
            [
                "deb [signed-by=/k] http://m/debian/ bookworm main",
                "deb [signed-by=/k] http://m/debian/ bookworm-updates main",
                "deb [signed-by=/k] http://m/security/ bookworm-security main"
            ]
        );
    }

    #[test]
    fn another_suite_comes_from_the_same_places() {
        assert_eq!(
            lines(LISTS, &recipe("Debian", "trixie")),
            [
                "deb [signed-by=/k] http://m/debian/ trixie main",
                "deb [signed-by=/k] http://m/debian/ trixie-updates main",
                "deb [signed-by=/k] http://m/security/ trixie-security main"
            ]
        );
    }

    #[test]
    fn of_two_suites_on_the_machine_the_right_one_is_taken() {
        let both = format!("{LISTS}Debian\thttp://n/debian/\ttrixie\ttrixie\tmain\n");
        let found = lines(&both, &recipe("Debian", "trixie"));
        assert_eq!(found, ["deb [signed-by=/k] http://n/debian/ trixie main"]);
    }

    #[test]
    fn a_machine_of_another_distribution_has_no_lines() {
        assert!(
            lines("Ubuntu\thttp://m/\tnoble\tnoble\tmain\n", &recipe("Debian", "x")).is_empty()
        );
        assert!(lines("", &recipe("Debian", "x")).is_empty());
        assert!(
            lines("Debian\thttp://m/ x\tb\tb\tmain\nDebian\n", &recipe("Debian", "b")).is_empty()
        );
    }

    #[test]
    fn only_settings_about_fetching_are_taken_and_only_where_they_are_set() {
        let dump = "APT::Install-Suggests \"1\";\nAcquire::http::Proxy \"http://p:1/\";\n\
            Acquire::https::Verify-Peer \"\";\nAcquire::Check-Date \"false\";\n\
            DPkg::Post-Invoke:: \"rm -rf /\";\n";
        assert_eq!(
            options(dump),
            [
                "Acquire::http::Proxy \"http://p:1/\"",
                "Acquire::Check-Date \"false\"",
                "Acquire::Languages \"none\""
            ]
        );
    }
}
