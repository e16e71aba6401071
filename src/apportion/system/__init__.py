"""The machine and its files: processors, memory, disks, paths, time limits. Imports no other part of the library."""
