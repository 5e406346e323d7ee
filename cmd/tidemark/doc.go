// Command tidemark is the command-line client of tidemarkd. Each verb is a file of its
// name; docs/cli.md is the contract of its JSON and exit codes.
package main
