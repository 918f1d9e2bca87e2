"""The demonstration: made-up scans arrive in a folder, and everything else is the real thing."""
