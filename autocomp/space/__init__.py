"""Rules × graph × profile → the choices that are legal and worth offering."""
