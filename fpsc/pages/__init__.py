"""Pages that need nothing but themselves: one HTML file, no network, light and dark."""
