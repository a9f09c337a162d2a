//! What derives from the table of elements.

/// Makes `VcpuState` and `Element` of the table: elements in the order in which they are restored,
/// each with its name in messages and its fields; a field with its type and value after reset.
macro_rules! vcpu_state {
    ($(
        $(#[doc = $element_doc:literal])*
        $element:ident $name:literal {
            $( $(#[doc = $doc:literal])* $field:ident: $type:ty = $reset:expr ),* $(,)?
        }
    )*) => {
        /// Everything that a virtual CPU is, independent of the engine that runs it.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs)] // Registers have the manuals' names.
        pub struct VcpuState { $($( $(#[doc = $doc])* pub $field: $type, )*)* }

        /// A part of the state that moves as a whole, in the order in which parts are restored.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Element { $( $(#[doc = $element_doc])* $element, )* }

        impl Element {
            /// All elements, in the order in which they are restored.
            pub const ALL: [Self; [$( Self::$element ),*].len()] = [$( Self::$element ),*];

            /// The element's name in messages, in the plural where it has several registers.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$element => $name, )* }
            }
        }

        impl VcpuState {
            /// The state of the bootstrap processor after power-up or RESET (Intel SDM 3A table
            /// 10-1): real mode at FFFF_FFF0H.
            pub fn reset() -> Self {
                Self { $($( $field: $reset, )*)* }
            }

            /// Whether two states are equal in an element.
            pub fn same(&self, element: Element, other: &Self) -> bool {
                match element {
                    $( Element::$element => $( self.$field == other.$field )&&*, )*
                }
            }

            /// Takes over an element of another state.
            pub fn take(&mut self, element: Element, other: &Self) {
                match element {
                    $( Element::$element => { $( self.$field = other.$field.clone(); )* } )*
                }
            }
        }

        impl Inspect for VcpuState {
            fn inspect(&self, path: &str, visit: &mut dyn FnMut(&str, Value)) {
                $($(
                    let path_of_field = alloc::format!("{path}.{}", stringify!($field));
                    self.$field.inspect(&path_of_field, visit);
                )*)*
            }
        }
    };
}
pub(super) use vcpu_state;
