"""What several tests share: small models, prepared sets, files of the field's formats, servers."""
