"""Operations of exported graphs: what is rewritten, what is translated here, and what is refused."""
