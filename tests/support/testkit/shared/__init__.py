"""Models, changes, texts and references that several test files share, a subject a module."""
