"""Models by name, their metafiles, publishing."""
