//! What is written down of a machine.
use serde::{Deserialize, Serialize};

/// The version of the form.
const FORM: u32 = 1;

/// The definition of a machine, `vm.toml` in its folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    form: u32,
    /// The name of the image that it was made from, as the user gave it.
    pub image: String,
    /// Which image of that name it was.
    pub image_id: String,
    /// What tells it from all other machines that ever were, 32 hexadecimal digits.
    pub instance: String,
}

impl Definition {
    /// For a new machine.
    pub fn new(image: String, image_id: String, instance: String) -> Self {
        Self { form: FORM, image, image_id, instance }
    }

    /// Reads one; what is wrong with it, if it cannot be.
    pub fn parse(text: &str) -> Result<Self, String> {
        let definition: Self = toml::from_str(text).map_err(|e| e.message().to_owned())?;
        match definition.form {
            FORM => Ok(definition),
            other => Err(format!("it is of form {other}, and this bv knows form {FORM}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_reads_back_as_itself_and_unknown_ones_are_refused() {
        let definition = Definition::new("debian:12".into(), "abc".into(), "f00".into());
        let text = toml::to_string(&definition).unwrap();
        assert_eq!(Definition::parse(&text), Ok(definition));
        assert!(Definition::parse(&text.replace("form = 1", "form = 2")).is_err());
        assert!(Definition::parse(&format!("{text}more = 1\n")).is_err());
        assert!(Definition::parse("").is_err());
    }
}
