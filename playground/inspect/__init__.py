"""What the page explains, as plain data: no torch objects leave this room."""
