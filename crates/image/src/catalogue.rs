//! The catalogue: which images there are by name, and how each comes to be.
//!
//! An image comes from a recipe, which builds it from its distribution's packages, or is a disk
//! that its distribution offers, by URL and SHA-512:
//!
//! ```
//! let catalogue = image::Catalogue::parse(
//!     r#"
//!     [image."dir:1"]
//!     description = "A disk by URL"
//!     url = "https://cloud.invalid/disk.qcow2"
//!     sha512 = "00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
//!     format = "qcow2"
//!     "#,
//! )?;
//! assert!(catalogue.find("dir:1").is_ok());
//! # Ok::<(), image::CatalogueError>(())
//! ```

use crate::store::{Format, Name, NameError};
use serde::Deserialize;
use std::collections::BTreeMap;

const EMBEDDED: &str = include_str!("../catalogue.toml");

/// The smallest disk that a recipe's files fit on, in bytes.
const LEAST_SIZE: u64 = 1 << 30;

/// The images that can be had by name.
#[derive(Clone, Debug)]
pub struct Catalogue {
    entries: Vec<Entry>,
}

/// An image that can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is called.
    pub name: Name,
    /// What else it is called.
    pub aliases: Vec<Name>,
    /// What it is, in a few words.
    pub description: String,
    /// How it comes to be.
    pub origin: Origin,
}

/// How an image comes to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It is built from packages.
    Recipe(Recipe),
    /// It is downloaded.
    Download(Remote),
}

/// What an image is built from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Whose packages, as their lists call it (the field Origin of a Release file).
    pub distribution: String,
    /// The file with the keys that the packages' lists are signed with.
    pub keyring: String,
    /// The release's code name.
    pub suite: String,
    /// The package of the kernel.
    pub kernel: String,
    /// The other packages.
    pub packages: Vec<String>,
    /// The size of the disk in bytes.
    pub size: u64,
}

/// A disk that is downloaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Where it is.
    pub url: String,
    /// In lower-case hexadecimal.
    pub sha512: String,
    /// The format of the disk.
    pub format: Format,
}

/// What is wrong with a catalogue, or with a name that was looked for in it.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// It is not TOML of the catalogue's form.
    #[error("the catalogue cannot be read; correct it as told below")]
    Syntax(#[from] toml::de::Error),
    /// A name is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A part of an entry is missing or cannot be.
    #[error("the catalogue's entry {name}: {fault}")]
    Entry {
        /// The entry.
        name: String,
        /// What is wrong, and what to do.
        fault: &'static str,
    },
    /// There is no such image.
    #[error("there is no image {name}; {}", suggest(.similar))]
    Unknown {
        /// What was looked for.
        name: Name,
        /// The names that come close, best first; or all there are.
        similar: Vec<Name>,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    image: BTreeMap<String, FileEntry>,
    #[serde(default)]
    recipe: BTreeMap<String, FileRecipe>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry {
    description: String,
    #[serde(default)]
    aliases: Vec<String>,
    recipe: Option<String>,
    suite: Option<String>,
    size: Option<String>,
    url: Option<String>,
    sha512: Option<String>,
    format: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRecipe {
    distribution: String,
    keyring: String,
    kernel: String,
    packages: Vec<String>,
}

impl Catalogue {
    /// The catalogue that Bivisor brings.
    ///
    /// # Errors
    /// None that a test of this crate would not have found.
    pub fn embedded() -> Result<Self, CatalogueError> {
        Self::parse(EMBEDDED)
    }

    /// The catalogue that `text` is.
    ///
    /// # Errors
    /// Fails where it is not of the catalogue's form; the message says what to correct.
    pub fn parse(text: &str) -> Result<Self, CatalogueError> {
        let file: File = toml::from_str(text)?;
        let entry = |(name, entry): (String, FileEntry)| entry.check(&name, &file.recipe);
        Ok(Self { entries: file.image.into_iter().map(entry).collect::<Result<_, _>>()? })
    }

    /// All images, by name.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The image of this name or alias.
    ///
    /// # Errors
    /// Fails where there is none, and then says which names come close.
    pub fn find(&self, name: &str) -> Result<&Entry, CatalogueError> {
        let name: Name = name.parse()?;
        let fits = |entry: &&Entry| entry.name == name || entry.aliases.contains(&name);
        self.entries.iter().find(fits).ok_or_else(|| {
            let similar = self.similar(&name);
            CatalogueError::Unknown { name, similar }
        })
    }

    /// The names within a third of the letters of `name`, or else all.
    fn similar(&self, name: &Name) -> Vec<Name> {
        let near = |entry: &&Entry| {
            let names = std::iter::once(&entry.name).chain(&entry.aliases);
            let nearest = names.map(|other| distance(&name.to_string(), &other.to_string())).min();
            nearest.is_some_and(|nearest| nearest <= name.to_string().len().div_ceil(3))
        };
        let names = |entries: Vec<&Entry>| entries.iter().map(|entry| entry.name.clone()).collect();
        let close: Vec<&Entry> = self.entries.iter().filter(near).collect();
        if close.is_empty() { names(self.entries.iter().collect()) } else { names(close) }
    }
}

impl FileEntry {
    fn check(
        self,
        name: &str,
        recipes: &BTreeMap<String, FileRecipe>,
    ) -> Result<Entry, CatalogueError> {
        let fault = |fault| CatalogueError::Entry { name: name.to_owned(), fault };
        let origin = match (&self.recipe, &self.url) {
            (Some(recipe), None) => {
                let recipe = recipes.get(recipe).ok_or_else(|| fault("there is no such recipe"))?;
                Origin::Recipe(self.recipe(recipe, fault)?)
            }
            (None, Some(url)) => Origin::Download(self.remote(url, fault)?),
            _ => return Err(fault("give either a recipe or a url")),
        };
        let aliases = self.aliases.iter().map(|alias| alias.parse()).collect::<Result<_, _>>()?;
        Ok(Entry { name: name.parse()?, aliases, description: self.description, origin })
    }

    fn recipe(
        &self,
        recipe: &FileRecipe,
        fault: impl Fn(&'static str) -> CatalogueError,
    ) -> Result<Recipe, CatalogueError> {
        let suite = self.suite.clone().ok_or_else(|| fault("a recipe needs a suite"))?;
        let size = self.size.as_deref().and_then(gibibytes);
        let size = size.filter(|size| *size >= LEAST_SIZE);
        if !recipe.keyring.starts_with('/') || recipe.keyring.contains([' ', ']']) {
            return Err(fault("a recipe's keyring is an absolute path without spaces"));
        }
        let words = [&recipe.kernel, &suite];
        if !recipe.packages.iter().chain(words).all(|word| is_package(word)) {
            return Err(fault("packages and suites have lower-case letters, digits, +, - and ."));
        }
        Ok(Recipe {
            distribution: recipe.distribution.clone(),
            keyring: recipe.keyring.clone(),
            suite,
            kernel: recipe.kernel.clone(),
            packages: recipe.packages.clone(),
            size: size
                .ok_or_else(|| fault("a recipe needs a size, as \"2GiB\", of 1GiB or more"))?,
        })
    }

    fn remote(
        &self,
        url: &str,
        fault: impl Fn(&'static str) -> CatalogueError,
    ) -> Result<Remote, CatalogueError> {
        if !["https://", "http://"].iter().any(|scheme| url.starts_with(scheme)) {
            return Err(fault("the url must begin with https:// or http://"));
        }
        let sha512 = self.sha512.as_deref().map(str::to_ascii_lowercase);
        let sha512 = sha512
            .filter(|sum| sum.len() == 128 && sum.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .ok_or_else(|| fault("a url needs its sha512, 128 hexadecimal digits"))?;
        let format = self.format.as_deref().and_then(|format| format.parse().ok());
        let format = format.ok_or_else(|| fault("a url needs a format, as raw or qcow2"))?;
        Ok(Remote { url: url.to_owned(), sha512, format })
    }
}

/// A size in whole GiB.
fn gibibytes(text: &str) -> Option<u64> {
    text.strip_suffix("GiB")?.parse::<u64>().ok()?.checked_mul(1 << 30)
}

/// Whether a word may be a package's or suite's name (Debian policy 5.6.1), and so neither an
/// option nor more than one word to the programs that get it.
fn is_package(word: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    word.bytes().next().is_some_and(letter)
        && word.bytes().all(|byte| letter(byte) || b"+-.".contains(&byte))
}

fn suggest(similar: &[Name]) -> String {
    let names: Vec<String> = similar.iter().map(Name::to_string).collect();
    match names.as_slice() {
        [] => "the catalogue is empty; use `bv image import FILE NAME`".to_owned(),
        [name] => format!("did you mean {name}? `bv image ls --available` lists all"),
        names => format!("there are {}, or use `bv image import FILE NAME`", names.join(", ")),
    }
}

/// How many letters must be put in, left out or changed to make one word of the other
/// (Levenshtein). Names are short, so the table may be made for each.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<u8> = other.bytes().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (index, letter) in one.bytes().enumerate() {
        let mut diagonal = index;
        let mut left = index + 1;
        for (place, byte) in row.iter_mut().skip(1).zip(&other) {
            let changed = diagonal + usize::from(letter != *byte);
            diagonal = *place;
            left = changed.min(*place + 1).min(left + 1);
            *place = left;
        }
        if let Some(first) = row.first_mut() {
            *first = index + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_catalogue_has_debian_by_number_name_and_alias() {
        let catalogue = Catalogue::embedded().unwrap();
        for name in ["debian:12", "debian:bookworm", "debian"] {
            let entry = catalogue.find(name).unwrap();
            let Origin::Recipe(recipe) = &entry.origin else { panic!("{entry:?}") };
            assert_eq!((recipe.suite.as_str(), recipe.size), ("bookworm", 2 << 30));
        }
        let Origin::Recipe(recipe) = &catalogue.find("debian:13").unwrap().origin else { panic!() };
        assert_eq!(recipe.suite, "trixie");
    }

    #[test]
    fn no_two_entries_have_a_name_in_common() {
        let catalogue = Catalogue::embedded().unwrap();
        let names = |entry: &Entry| [&[entry.name.clone()][..], &entry.aliases].concat();
        let mut all: Vec<String> =
            catalogue.entries().iter().flat_map(names).map(|name| name.to_string()).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn an_unknown_name_gets_the_nearest_or_all() {
        let catalogue = Catalogue::embedded().unwrap();
        let text = |name: &str| catalogue.find(name).unwrap_err().to_string();
        assert!(text("debain:13").contains("debian:13"), "{}", text("debain:13"));
        assert!(text("fedora:42").contains("there are debian:12, debian:13"));
        assert!(text("../x").contains("cannot be an image's name"), "{}", text("../x"));
    }

    #[test]
    fn the_distance_of_words_counts_their_letters_that_differ() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!((distance("", "ab"), distance("ab", ""), distance("ab", "ab")), (2, 2, 0));
    }

    #[test]
    fn what_an_entry_lacks_is_named() {
        let recipe = "[recipe.r]\ndistribution='D'\nkeyring='/k'\nkernel='k'\npackages=['p']\n";
        let entry = |lines: &str| {
            let text = format!("{recipe}[image.'x:1']\ndescription='x'\n{lines}");
            Catalogue::parse(&text).map(|_| ()).map_err(|error| error.to_string())
        };
        assert_eq!(entry("recipe='r'\nsuite='s'\nsize='1GiB'"), Ok(()));
        let refused = [
            ("", "either a recipe or a url"),
            ("recipe='q'", "no such recipe"),
            ("recipe='r'", "needs a suite"),
            ("recipe='r'\nsuite='s'", "needs a size"),
            ("recipe='r'\nsuite='s'\nsize='0GiB'", "needs a size"),
            ("recipe='r'\nsuite='--s'\nsize='2GiB'", "lower-case letters"),
            ("url='ftp://x'", "https://"),
            ("url='https://x'", "sha512"),
            ("url='https://x'\nsha512='00'", "sha512"),
            ("aliases=['/']\nrecipe='r'\nsuite='s'\nsize='2GiB'", "cannot be an image's name"),
            ("colour='red'", "cannot be read"),
        ];
        for (lines, words) in refused {
            let error = entry(lines).unwrap_err();
            assert!(error.contains(words), "{lines}: {error}");
        }
    }
}
