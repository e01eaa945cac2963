"""Values and files that nobody makes by hand, for property tests."""
