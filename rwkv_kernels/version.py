"""The version, on its own so that the build can read it without torch."""

VERSION = "0.1.0"
