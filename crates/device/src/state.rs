//! Saved state: self-describing, versioned per device, append-only.
use std::time::Duration;

/// The value of one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number, register, flag (0 or 1) or a duration in nanoseconds.
    Number(u64),
    /// A block of bytes, such as a FIFO or CMOS memory.
    Bytes(Vec<u8>),
}

/// The state of one device: its kind, the version of its layout, and named fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// What kind of device this is: `pit`.
    pub kind: String,
    /// Version of the layout, from 1.
    pub version: u32,
    /// The fields, in the order in which the device wrote them.
    pub fields: Vec<(String, Value)>,
}

/// Why a state does not fit a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The state is one of another kind of device.
    #[error("the saved state is of a {found}, not of a {wanted}; restore it into the same machine")]
    Kind {
        /// The device that was asked to restore.
        wanted: String,
        /// The kind of the state.
        found: String,
    },
    /// The state comes from a newer program.
    #[error(
        "{kind}: the saved state has version {found}, this program knows versions up to {known}; \
         use the program that saved it"
    )]
    Version {
        /// The device.
        kind: String,
        /// The version of the state.
        found: u32,
        /// The newest version that is known.
        known: u32,
    },
    /// A field is missing.
    #[error("{kind}: the saved state has no field {field}; it is damaged")]
    Missing {
        /// The device.
        kind: String,
        /// The field.
        field: String,
    },
    /// A field was not asked for.
    #[error("{kind}: the saved state has an unknown field {field}; use the program that saved it")]
    Unknown {
        /// The device.
        kind: String,
        /// The field.
        field: String,
    },
    /// A value is not valid for its field.
    #[error("{kind}: the saved value of {field} is out of range; the state is damaged")]
    Range {
        /// The device.
        kind: String,
        /// The field.
        field: String,
    },
}

/// What can be the value of a field.
pub trait Field: Sized {
    /// To the saved form.
    fn to_value(&self) -> Value;
    /// From the saved form, `None` where it is out of range.
    fn from_value(value: &Value) -> Option<Self>;
}

macro_rules! number_field {
    ($($t:ty),*) => {$(
        impl Field for $t {
            fn to_value(&self) -> Value { Value::Number((*self).into()) }
            fn from_value(value: &Value) -> Option<Self> {
                match value { Value::Number(n) => (*n).try_into().ok(), Value::Bytes(_) => None }
            }
        }
    )*};
}
number_field!(u8, u16, u32, u64);

impl Field for bool {
    fn to_value(&self) -> Value {
        Value::Number((*self).into())
    }
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Number(0) => Some(false),
            Value::Number(1) => Some(true),
            _ => None,
        }
    }
}
impl Field for Duration {
    fn to_value(&self) -> Value {
        // 64 bits of nanoseconds are 584 years of running.
        Value::Number(u64::try_from(self.as_nanos()).unwrap_or(u64::MAX))
    }
    fn from_value(value: &Value) -> Option<Self> {
        u64::from_value(value).map(Self::from_nanos)
    }
}
impl Field for usize {
    fn to_value(&self) -> Value {
        Value::Number(*self as u64)
    }
    fn from_value(value: &Value) -> Option<Self> {
        u64::from_value(value)?.try_into().ok()
    }
}
impl Field for i64 {
    fn to_value(&self) -> Value {
        Value::Number(self.cast_unsigned())
    }
    fn from_value(value: &Value) -> Option<Self> {
        u64::from_value(value).map(u64::cast_signed)
    }
}
impl<T: Field> Field for Option<T> {
    fn to_value(&self) -> Value {
        self.as_ref().map_or(Value::Bytes(Vec::new()), Field::to_value)
    }
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Bytes(bytes) if bytes.is_empty() => Some(None),
            value => T::from_value(value).map(Some),
        }
    }
}
impl Field for Vec<u8> {
    fn to_value(&self) -> Value {
        Value::Bytes(self.clone())
    }
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Bytes(bytes) => Some(bytes.clone()),
            Value::Number(_) => None,
        }
    }
}
impl<const N: usize> Field for [u8; N] {
    fn to_value(&self) -> Value {
        Value::Bytes(self.to_vec())
    }
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Bytes(bytes) => bytes.as_slice().try_into().ok(),
            Value::Number(_) => None,
        }
    }
}

impl SavedState {
    /// A state without fields yet.
    pub fn new(kind: &str, version: u32) -> Self {
        Self { kind: kind.to_owned(), version, fields: Vec::new() }
    }

    /// The state of a device that has none.
    pub fn stateless(kind: &str) -> Self {
        Self::new(kind, 1)
    }

    /// Adds a field.
    pub fn put(&mut self, field: &str, value: &impl Field) {
        self.fields.push((field.to_owned(), value.to_value()));
    }

    /// Begins to restore a device of `kind` that knows versions 1 to `version`.
    ///
    /// # Errors
    /// The state is of another kind, or newer.
    pub fn reader(&self, kind: &str, version: u32) -> Result<Reader<'_>, RestoreError> {
        if self.kind != kind {
            return Err(RestoreError::Kind { wanted: kind.to_owned(), found: self.kind.clone() });
        }
        if self.version > version {
            let (kind, found) = (kind.to_owned(), self.version);
            return Err(RestoreError::Version { kind, found, known: version });
        }
        Ok(Reader { state: self, taken: vec![false; self.fields.len()] })
    }
}

/// Takes fields out of a state and knows which were left.
#[derive(Debug)]
pub struct Reader<'a> {
    state: &'a SavedState,
    taken: Vec<bool>,
}

impl Reader<'_> {
    /// The version of the state's layout.
    pub fn version(&self) -> u32 {
        self.state.version
    }

    /// The value of a field.
    ///
    /// # Errors
    /// The field is missing or its value does not fit the type.
    pub fn get<T: Field>(&mut self, field: &str) -> Result<T, RestoreError> {
        let mut fields = self.state.fields.iter().zip(&mut self.taken);
        let Some(((_, value), taken)) = fields.find(|((name, _), _)| name == field) else {
            let kind = self.state.kind.clone();
            return Err(RestoreError::Missing { kind, field: field.to_owned() });
        };
        *taken = true;
        T::from_value(value).ok_or_else(|| self.out_of_range(field))
    }

    /// The value of a field, checked by the device.
    ///
    /// # Errors
    /// As [`Reader::get`], and where `valid` says no.
    pub fn get_if<T: Field>(
        &mut self,
        field: &str,
        valid: impl FnOnce(&T) -> bool,
    ) -> Result<T, RestoreError> {
        let value = self.get(field)?;
        if valid(&value) { Ok(value) } else { Err(self.out_of_range(field)) }
    }

    /// The error for a field whose value the device cannot take.
    pub fn out_of_range(&self, field: &str) -> RestoreError {
        RestoreError::Range { kind: self.state.kind.clone(), field: field.to_owned() }
    }

    /// Ends the restore.
    ///
    /// # Errors
    /// A field was left over: nothing of a state is dropped silently.
    pub fn finish(self) -> Result<(), RestoreError> {
        match self.state.fields.iter().zip(&self.taken).find(|(_, taken)| !**taken) {
            None => Ok(()),
            Some(((field, _), _)) => {
                Err(RestoreError::Unknown { kind: self.state.kind.clone(), field: field.clone() })
            }
        }
    }
}

/// A structure whose fields [`crate::saved_fields!`] lists.
pub trait SaveFields {
    /// Adds each field as `prefix` + its name.
    fn save_fields(&self, prefix: &str, state: &mut SavedState);
    /// Takes each field back.
    ///
    /// # Errors
    /// Names the field that is missing or out of range.
    fn restore_fields(&mut self, prefix: &str, reader: &mut Reader<'_>)
    -> Result<(), RestoreError>;
}

/// Lists the saved fields of a structure once: `saved_fields!(Channel: mode, count)` makes it
/// [`SaveFields`], so that saving and restoring cannot disagree.
#[macro_export]
macro_rules! saved_fields {
    ($type:ty: $($field:ident),+ $(,)?) => {
        impl $crate::state::SaveFields for $type {
            fn save_fields(&self, prefix: &str, state: &mut $crate::SavedState) {
                $(state.put(&format!("{prefix}{}", stringify!($field)), &self.$field);)+
            }
            fn restore_fields(
                &mut self,
                prefix: &str,
                reader: &mut $crate::state::Reader<'_>,
            ) -> Result<(), $crate::RestoreError> {
                $(self.$field = reader.get(&format!("{prefix}{}", stringify!($field)))?;)+
                Ok(())
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> SavedState {
        let mut state = SavedState::new("sample", 1);
        state.put("level", &true);
        state.put("count", &300u16);
        state.put("deadline", &None::<Duration>);
        state.put("memory", &[1u8, 2, 3]);
        state
    }

    #[test]
    fn fields_come_back_as_they_were_put() {
        let state = sample();
        let mut reader = state.reader("sample", 1).unwrap();
        assert!(reader.get::<bool>("level").unwrap());
        assert_eq!(reader.get::<u16>("count").unwrap(), 300);
        assert_eq!(reader.get::<Option<Duration>>("deadline").unwrap(), None);
        assert_eq!(reader.get::<[u8; 3]>("memory").unwrap(), [1, 2, 3]);
        reader.finish().unwrap();
    }

    #[test]
    fn a_field_that_does_not_fit_is_named() {
        let state = sample();
        let mut reader = state.reader("sample", 1).unwrap();
        let field = |name: &str| (String::from("sample"), String::from(name));
        let (kind, name) = field("count");
        assert_eq!(reader.get::<u8>("count"), Err(RestoreError::Range { kind, field: name }));
        let (kind, name) = field("gone");
        assert_eq!(reader.get::<u8>("gone"), Err(RestoreError::Missing { kind, field: name }));
        let (kind, name) = field("level");
        assert_eq!(reader.finish(), Err(RestoreError::Unknown { kind, field: name }));
    }

    #[test]
    fn a_state_of_another_kind_or_a_newer_version_is_refused() {
        let mut state = sample();
        assert!(matches!(state.reader("other", 1), Err(RestoreError::Kind { .. })));
        state.version = 2;
        assert!(matches!(state.reader("sample", 1), Err(RestoreError::Version { .. })));
    }
}
