"""systemd units of our daemons: `texts` has them, `install` writes them."""
