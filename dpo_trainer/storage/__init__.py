"""Storage: folders that are kept between runs, files that are whole or not there, SQLite databases that survive damage, the hub."""
