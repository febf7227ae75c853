// The marks inside a paragraph of Markdown: code, bold, italics, strikethrough and links. Formulas, images and HTML stay
// as the model wrote them. The result is made of elements and text nodes only, so nothing in a text can run or load.
// The algorithm is CommonMark's, a little simplified, and no text takes more than linear time.

const MAX_DEPTH = 20;

const TOKEN = new RegExp(
    [
        /\\\((?:\\[^()]|[^\\])*(?:\\\)|$)/, // formulas, as in the notebook's chat box
        /\\\[(?:\\[^[\]]|[^\\])*(?:\\\]|$)/,
        /\$\$(?:\\.|[^\\$])+\$\$/s,
        /(?<!\w)\$(?!\s|\d[\w.,]*\s[a-z]{2})(?:\\[^\n]|[^\\$`\n])+(?<!\s)\$(?!\d)/i,
        /(?<escape>\\[!-/:-@[-`{-~])/,
        /(?<ticks>`+)/,
        /(?<bracket>!?\[)/,
        /<(?<autolink>https?:\/\/[^\s<>]*)>/,
        /(?<!\w)(?<url>https?:\/\/[^\s<>"'`]+)/,
        /(?<run>\*+|_+|~~+)/,
    ].map(({source}) => source).join("|"),
    "g",
);
const TARGET = /\]\(\s*(?:<([^<>\n]*)>|((?:[^\s()<>]|\([^\s()<>]*\))+))(?:\s+"[^"\n]*")?\s*\)/y;
const BRACKETS = /\\.|[[\]]/gs;
const TAGS = {"**": "strong", __: "strong", "*": "em", _: "em", "~~": "s"};

// Return `text` as a fragment of the document. In the text of a link, no other link is made.
export const renderInline = (text, hasLinks = true) => {
    const pieces = tokenize(text, hasLinks);
    matchRuns(pieces);
    return build(pieces);
};

// Return pieces: { text }, { node }, or a run of marks: { mark, count, canOpen, canClose, opens, closes }.
const tokenize = (text, hasLinks) => {
    const pieces = [], closings = closingBrackets(text), ticks = tickRuns(text);
    let done = 0; // where the text begins that is in no piece yet
    const add = (piece, start, end) => {
        if (start > done) pieces.push({text: text.slice(done, start)});
        pieces.push(piece);
        token.lastIndex = done = end;
    };
    const token = new RegExp(TOKEN); // its own, because the text of a link is read meanwhile
    for (let found; (found = token.exec(text));) {
        const {0: whole, index, groups} = found, end = index + whole.length;
        if (groups.escape) {
            add({text: whole[1]}, index, end);
        } else if (groups.ticks) {
            const close = nextRun(ticks.get(whole.length), index);
            if (close === undefined) add({text: whole}, index, end);
            else add({node: codeOf(text.slice(end, close))}, index, close + whole.length);
        } else if (groups.bracket) {
            const close = closings.get(end - 1);
            TARGET.lastIndex = close ?? text.length;
            const target = close === undefined ? null : TARGET.exec(text);
            const isImage = whole.length === 2;
            const href = target && !isImage && hasLinks && safe(target[1] ?? target[2]);
            if (href) add({node: linkOf(href, renderInline(text.slice(end, close), false))}, index, TARGET.lastIndex);
            else if (target && isImage) add({text: text.slice(index, TARGET.lastIndex)}, index, TARGET.lastIndex);
            else add({text: whole}, index, end);
        } else if (groups.autolink || groups.url) {
            const url = groups.autolink ?? withoutEnd(groups.url), href = hasLinks && safe(url);
            const stop = groups.autolink ? end : index + url.length;
            add(href ? {node: linkOf(href, url)} : {text: text.slice(index, stop)}, index, stop);
        } else if (groups.run) {
            add(runOf(text, index, end), index, end);
        } else {
            add({text: whole}, index, end); // a formula
        }
    }
    if (done < text.length) pieces.push({text: text.slice(done)});
    return pieces;
};

// Return where the bracket that each bracket opens is closed.
const closingBrackets = text => {
    const closings = new Map(), open = [];
    for (const {0: sign, index} of text.matchAll(BRACKETS)) {
        if (sign === "[") open.push(index);
        else if (sign === "]" && open.length) closings.set(open.pop(), index);
    }
    return closings;
};

// Return the places of all runs of backticks by their lengths, the last one first.
const tickRuns = text => {
    const runs = new Map();
    for (const {0: run, index} of [...text.matchAll(/`+/g)].reverse()) {
        if (!runs.has(run.length)) runs.set(run.length, []);
        runs.get(run.length).push(index);
    }
    return runs;
};

// Return the first place after `index`, and forget those before it.
const nextRun = (places = [], index) => {
    while (places.length && places.at(-1) <= index) places.pop();
    return places.at(-1);
};

const codeOf = text => {
    const code = document.createElement("code");
    const line = text.replaceAll("\n", " ");
    code.textContent = /^ .*[^ ].* $/.test(line) ? line.slice(1, -1) : line;
    code.dir = "ltr";
    return code;
};

const linkOf = (href, content) => {
    const link = document.createElement("a");
    link.href = href;
    link.title = href;
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
    link.append(content);
    return link;
};

// Return a complete http or https address, or "" for any other one.
const safe = url => {
    try {
        const {protocol, href} = new URL(url);
        return ["http:", "https:"].includes(protocol) ? href : "";
    } catch {
        return "";
    }
};

// Return an address in a sentence without the signs that follow it. A closing parenthesis stays if the address opens it.
const withoutEnd = url => {
    let end = url.length, open = url.split("(").length - url.split(")").length;
    while (/[.,;:!?*_~\])}]/.test(url[end - 1]) && (url[end - 1] !== ")" || open < 0)) {
        if (url[end - 1] === ")") open += 1;
        end -= 1;
    }
    return url.slice(0, end);
};

const isSpace = sign => sign === undefined || /\s/u.test(sign);
const isPunctuation = sign => sign !== undefined && /[\p{P}\p{S}]/u.test(sign);

const runOf = (text, index, end) => {
    const before = text[index - 1], after = text[end], mark = text[index];
    const opens = !isSpace(after) && (!isPunctuation(after) || isSpace(before) || isPunctuation(before));
    const closes = !isSpace(before) && (!isPunctuation(before) || isSpace(after) || isPunctuation(after));
    return {
        mark,
        count: end - index,
        length: end - index,
        canOpen: opens && (mark !== "_" || !closes || isPunctuation(before)),
        canClose: closes && (mark !== "_" || !opens || isPunctuation(after)),
        opens: [],
        closes: 0,
    };
};

// Match each run that closes with the nearest one that it can close.
const matchRuns = pieces => {
    const open = {"*": [], _: [], "~": []};
    pieces.forEach((piece, place) => {
        if (!piece.mark) return;
        piece.place = place;
        const openers = open[piece.mark], least = piece.mark === "~" ? 2 : 1;
        while (piece.canClose && piece.count >= least) {
            const opener = openers.slice(-MAX_DEPTH).findLast(opener => canMatch(opener, piece));
            if (!opener) break;
            const used = Math.min(opener.count, piece.count, 2);
            opener.opens.unshift(TAGS[piece.mark.repeat(used)]);
            piece.closes += 1;
            opener.count -= used;
            piece.count -= used;
            for (const others of Object.values(open)) while (others.at(-1)?.place > opener.place) others.pop();
            if (opener.count < least) openers.pop();
        }
        if (piece.canOpen && piece.count >= least) openers.push(piece);
    });
};

// CommonMark's rules 9 and 10.
const canMatch = (opener, closer) => {
    const isEither = opener.canClose || closer.canOpen;
    return !isEither || (opener.length + closer.length) % 3 > 0 || closer.length % 3 === 0;
};

const build = pieces => {
    const outermost = document.createDocumentFragment(), outside = [];
    let here = outermost;
    for (const piece of pieces) {
        for (let count = piece.closes ?? 0; count; count -= 1) here = outside.pop();
        if (piece.node) here.append(piece.node);
        else addText(here, piece.mark ? piece.mark.repeat(piece.count) : piece.text);
        for (const tag of piece.opens ?? []) {
            outside.push(here);
            if (outside.length > MAX_DEPTH) continue;
            const element = document.createElement(tag);
            here.append(element);
            here = element;
        }
    }
    return outermost;
};

const addText = (parent, text) => {
    text.split(/ *\n/).forEach((line, number) => {
        if (number) parent.append(document.createElement("br"));
        if (line) parent.append(line);
    });
};
