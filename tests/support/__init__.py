"""Stand-ins for machines that the tests do not have."""
