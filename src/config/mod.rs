//! A service's definition, from flags into one validated type.
