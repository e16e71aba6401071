"""The plan of `apportion demo`: amounts of work that fit the machine, and the seconds of each part."""
