"""The web server of the page: its routes, sessions and protections."""
