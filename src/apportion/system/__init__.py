"""The machine: processors, memory, disks, paths, locks, time limits. Imports only `errors` of the library."""
