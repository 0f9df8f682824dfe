"""Teachers: experts that grade what the student wrote."""
