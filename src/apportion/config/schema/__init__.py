"""The parts that settings are built from: base class, rules of fields, names that changed."""
