"""Where modules run and how their time is taken."""
