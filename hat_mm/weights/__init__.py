"""Weight files: official and native tensor names, reading and writing, downloads."""
