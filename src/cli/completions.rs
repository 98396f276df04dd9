//! `imgdm completions`: what a shell needs to complete our command lines. For packages.
//!
//! Options, their values, files and directories come from the clap tree. The names of what
//! is attached are read from sysfs by the shell itself: no process, and no root.

use std::fmt::Write as _;
use std::io::Write as _;

use clap::{Arg, Command, ValueEnum, ValueHint};
use clap_complete::aot::{Fish, Zsh, generate};
use imgdm::device::name::UUID_PREFIX;

use super::output::stdout;
use super::visible_commands;

/// Print a shell's completions
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm completions bash > /etc/bash_completion.d/imgdm\n  imgdm completions zsh > /usr/local/share/zsh/site-functions/_imgdm\n  imgdm completions fish > ~/.config/fish/completions/imgdm.fish"
)]
pub(crate) struct Args {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut commands = with_hints(visible_commands());
    commands.build();
    let script = match args.shell {
        Shell::Bash => bash(&commands)?,
        Shell::Zsh => zsh(commands)?,
        Shell::Fish => fish(commands)?,
    };
    Ok(stdout()?.write_all(script.as_bytes())?)
}

/// What may stand in the place of a value.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// One of these words.
    Words(Vec<String>),
    /// The name of an attachment, or a file.
    Attached,
    Files,
    Directories,
    /// What only the user knows.
    Unknown,
}

fn wanted(arg: &Arg) -> Wanted {
    let words: Vec<_> = arg
        .get_possible_values()
        .iter()
        .filter(|value| !value.is_hide_set())
        .map(|value| value.get_name().to_owned())
        .collect();
    if !words.is_empty() {
        return Wanted::Words(words);
    }
    let called = arg.get_value_names().and_then(|names| names.first()).map_or("", |name| name);
    // Attached, or by path: NAME|PATH, IMAGE|NAME. A lone NAME is another table's.
    if arg.is_positional() && called.contains('|') && called.split('|').any(|name| name == "NAME") {
        return Wanted::Attached;
    }
    match arg.get_value_hint() {
        _ if called == "DIR" => Wanted::Directories,
        _ if called.starts_with("FILE") => Wanted::Files,
        ValueHint::AnyPath => Wanted::Files,
        _ => Wanted::Unknown,
    }
}

/// The same commands with hints that clap_complete understands. It has none for names of our
/// own, so user names, which nothing of ours takes, stand for attachments.
fn with_hints(commands: Command) -> Command {
    commands.mut_subcommands(|command| {
        command.mut_args(|arg| {
            let hint = match wanted(&arg) {
                Wanted::Words(_) => return arg,
                Wanted::Attached => ValueHint::Username,
                Wanted::Files => ValueHint::AnyPath,
                Wanted::Directories => ValueHint::DirPath,
                Wanted::Unknown if arg.get_action().takes_values() => ValueHint::Other,
                Wanted::Unknown => return arg,
            };
            arg.value_hint(hint)
        })
    })
}

fn generated(
    generator: impl clap_complete::Generator,
    mut commands: Command,
) -> anyhow::Result<String> {
    let mut script = Vec::new();
    generate(generator, &mut commands, "imgdm", &mut script);
    Ok(String::from_utf8(script)?)
}

fn zsh(commands: Command) -> anyhow::Result<String> {
    let script = generated(Zsh, commands)?;
    let script = script.replace(":_users'", ":_imgdm_attached_or_file'");
    let functions = ZSH_ATTACHED.replace("@PREFIX@", UUID_PREFIX);
    // `#compdef` has to be the first line, and the call the last.
    let (first, rest) = script.split_once('\n').unwrap_or_default();
    Ok(format!("{first}\n\n{functions}{rest}"))
}

const ZSH_ATTACHED: &str = r#"_imgdm_attached() {
    local file uuid name
    local -a names expl
    for file in /sys/block/dm-*/dm/uuid(N); do
        uuid= name=
        read -r uuid <"$file" 2>/dev/null
        [[ $uuid == @PREFIX@*-top-* ]] || continue
        read -r name <"${file%uuid}name" 2>/dev/null && names+=("$name")
    done
    _wanted attachments expl 'attached image' compadd -a names
}

_imgdm_attached_or_file() {
    _alternative 'attachments:attached image:_imgdm_attached' 'files:file:_files'
}
"#;

fn fish(commands: Command) -> anyhow::Result<String> {
    // The generator leaves out what is no option.
    let mut positionals = FISH_ATTACHED.replace("@PREFIX@", UUID_PREFIX);
    for command in commands.get_subcommands() {
        let name = command.get_name();
        let of_command = format!("complete -c imgdm -n \"__fish_imgdm_using_subcommand {name}\"");
        let mut takes_files = false;
        for arg in command.get_positionals() {
            let list = match wanted(arg) {
                Wanted::Files => {
                    takes_files = true;
                    continue;
                }
                Wanted::Attached => {
                    takes_files = true;
                    "(__imgdm_attached)".to_owned()
                }
                Wanted::Directories => "(__fish_complete_directories)".to_owned(),
                Wanted::Words(words) => words.join(" "),
                Wanted::Unknown => continue,
            };
            writeln!(positionals, "{of_command} -a \"{list}\"")?;
        }
        if !takes_files {
            writeln!(positionals, "{of_command} -f")?;
        }
    }
    Ok(generated(Fish, commands)? + &positionals)
}

const FISH_ATTACHED: &str = r#"
function __imgdm_attached
    for file in /sys/block/dm-*/dm/uuid
        if string match -q -- '@PREFIX@*-top-*' (cat $file 2>/dev/null)
            cat (string replace -r 'uuid$' name -- $file) 2>/dev/null
        end
    end
end

complete -c imgdm -n __fish_imgdm_needs_command -f
"#;

/// Bash leaves files and directories to readline, which knows how to quote them; its own
/// generator in clap_complete offers options where an image should stand.
fn bash(commands: &Command) -> anyhow::Result<String> {
    let (mut valued, mut options) = (String::new(), String::new());
    let (mut values, mut positionals) = (String::new(), String::new());
    for command in commands.get_subcommands() {
        let name = command.get_name();
        let (mut all, mut with_value) = (Vec::new(), Vec::new());
        for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
            if let Some(index) = arg.get_index() {
                bash_case(&mut positionals, &format!("'{name} {index}'"), &wanted(arg))?;
                continue;
            }
            let spellings: Vec<_> = (arg.get_short().map(|short| format!("-{short}")).into_iter())
                .chain(arg.get_long().map(|long| format!("--{long}")))
                .collect();
            if arg.get_action().takes_values() {
                let patterns: Vec<_> =
                    spellings.iter().map(|option| format!("'{name} {option}'")).collect();
                bash_case(&mut values, &patterns.join(" | "), &wanted(arg))?;
                // A value that may be left out comes after '=' alone.
                if !arg.is_require_equals_set() {
                    with_value.extend(spellings.clone());
                }
            }
            all.extend(spellings);
        }
        writeln!(options, "        {name}) options='{}' ;;", all.join(" "))?;
        if !with_value.is_empty() {
            writeln!(valued, "                {name}) valued=' {} ' ;;", with_value.join(" "))?;
        }
    }
    let names: Vec<_> = commands.get_subcommands().map(Command::get_name).collect();
    Ok(BASH
        .replace("@PREFIX@", UUID_PREFIX)
        .replace("@COMMANDS@", &names.join(" "))
        .replace("@VALUED@", &valued)
        .replace("@OPTIONS@", &options)
        .replace("@VALUES@", &values)
        .replace("@POSITIONALS@", &positionals))
}

fn bash_case(cases: &mut String, pattern: &str, wanted: &Wanted) -> anyhow::Result<()> {
    let action = match wanted {
        Wanted::Words(words) => format!("words='{}'", words.join(" ")),
        Wanted::Attached => "words=$(_imgdm_attached)".to_owned(),
        Wanted::Directories => "compopt -o dirnames +o default +o bashdefault".to_owned(),
        Wanted::Files => ":".to_owned(),
        Wanted::Unknown => "compopt +o default +o bashdefault".to_owned(),
    };
    Ok(writeln!(cases, "        {pattern}) {action} ;;")?)
}

const BASH: &str = r#"# Completions of imgdm for bash.

_imgdm_attached() {
    local file uuid name
    for file in /sys/block/dm-*/dm/uuid; do
        uuid= name=
        { read -r uuid <"$file"; } 2>/dev/null
        [[ $uuid == @PREFIX@*-top-* ]] || continue
        { read -r name <"${file%uuid}name"; } 2>/dev/null && printf '%s\n' "$name"
    done
}

_imgdm() {
    # COMP_WORDS is split at '=', ':' and '@' too, which names and options hold.
    local given cur= prev= command= place=1 i valued=' ' options= words=
    read -ra given <<<"${COMP_LINE:0:COMP_POINT}"
    if [[ ${COMP_LINE:0:COMP_POINT} != *[[:blank:]] ]]; then
        cur=${given[-1]}
        unset 'given[-1]'
    fi
    for ((i = 1; i < ${#given[@]}; i++)); do
        if [[ ${given[i]} == -* ]]; then
            # Its value is no argument; at the end it is what is asked for.
            [[ $valued != *" ${given[i]} "* ]] || prev=${given[i++]}
        elif [[ -z $command ]]; then
            command=${given[i]}
            case $command in
@VALUED@            esac
        else
            ((place++))
        fi
    done
    ((i > ${#given[@]})) || prev=
    if [[ -z $prev && $cur == --*=* ]]; then
        prev=${cur%%=*} cur=${cur#*=}
    fi

    case $command in
        '') options='-h --help -V --version -q --quiet' words='@COMMANDS@' ;;
@OPTIONS@    esac
    case "$command $prev" in
@VALUES@        *)
            if [[ $cur == -* ]]; then
                words=$options
            else
                case "$command $place" in
@POSITIONALS@                    *) compopt +o default +o bashdefault ;;
                esac
            fi
            ;;
    esac
    COMPREPLY=()
    [[ -n $words ]] || return
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
    # Readline replaces no more than its own last word.
    local kept=${cur%"$2"}
    COMPREPLY=("${COMPREPLY[@]#"$kept"}")
}

complete -F _imgdm -o bashdefault -o default imgdm
"#;
