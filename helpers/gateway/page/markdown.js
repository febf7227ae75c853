// The Markdown of an answer: its blocks. Everything becomes elements and text nodes, never HTML, so that nothing in a
// text can run or load. The marks inside a block are `renderInline`'s.

import {copyButton} from "./clipboard.js";
import {renderInline} from "./inline.js";

const MAX_DEPTH = 12; // of lists and quotes in one another
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DELIMITER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const FORMULA = /^ {0,3}(\\\[|\$\$)/;
const FORMULA_END = {"\\[": "\\]", $$: "$$"};

// Shows a text that grows in an element. Only the blocks that have changed are drawn again.
export class MarkdownView {
    constructor(element) {
        this.element = element;
        this.sources = [];
    }

    update(text) {
        const blocks = parse(text.split("\n"), 0);
        let same = 0;
        while (same < blocks.length && blocks[same].source === this.sources[same]) same += 1;
        while (this.element.children.length > same) this.element.lastElementChild.remove();
        this.element.append(...blocks.slice(same).map(({make}) => make()));
        this.sources = blocks.map(({source}) => source);
    }
}

// Return the blocks of the lines: the `source` of each, and a function that makes its element.
const parse = (lines, depth) => {
    const blocks = [];
    for (let start = 0; start < lines.length;) {
        if (!lines[start].trim()) {
            start += 1;
            continue;
        }
        const [end, make] = (depth < MAX_DEPTH && blockAt(lines, start, depth)) || paragraphAt(lines, start, depth);
        blocks.push({source: lines.slice(start, end).join("\n"), make});
        start = end;
    }
    return blocks;
};

// Return where the block that begins on a line ends, and a function that makes it; or null for a paragraph.
const blockAt = (lines, start, depth) => {
    const line = lines[start];
    let found;
    if ((found = FENCE.exec(line))) return fenceAt(lines, start, found);
    if ((found = HEADING.exec(line))) {
        const text = line.slice(found[0].length).trimEnd().replace(/(?:^|\s)#+$/, "");
        // the page's own headings are h1 and h2
        return [start + 1, () => element(`h${Math.min(found[1].length + 2, 6)}`, renderInline(text))];
    }
    if (RULE.test(line)) return [start + 1, () => document.createElement("hr")];
    if (QUOTE.test(line)) {
        const hasText = next => next.replace(QUOTE, "").trim();
        const goesOn = (next, index) => next.trim() && hasText(lines[index - 1]) && !ITEM.test(next);
        const end = endOf(lines, start, (next, index) =>
            QUOTE.test(next) || (goesOn(next, index) && !interrupts(lines, index)));
        const inner = lines.slice(start, end).map(next => next.replace(QUOTE, ""));
        return [end, () => element("blockquote", ...nodesOf(inner, depth + 1))];
    }
    if (ITEM.test(line)) return listAt(lines, start, depth);
    if (isTable(lines, start)) return tableAt(lines, start);
    if ((found = FORMULA.exec(line))) return formulaAt(lines, start, found);
    return null;
};

const paragraphAt = (lines, start, depth) => {
    const isText = (line, index) => line.trim() && !(depth < MAX_DEPTH && interrupts(lines, index));
    const end = endOf(lines, start, isText);
    const text = lines.slice(start, end).map(line => line.trimStart()).join("\n").trimEnd();
    return [end, () => element("p", renderInline(text))];
};

// Return whether a block begins here even in the middle of a paragraph.
const interrupts = (lines, index) => {
    const line = lines[index], item = ITEM.exec(line);
    if (item) return item[0].length < line.length && (item[2].length === 1 || /^1[.)]$/.test(item[2]));
    const kinds = [FENCE, HEADING, RULE, QUOTE, FORMULA];
    return kinds.some(kind => kind.test(line)) || isTable(lines, index);
};

const fenceAt = (lines, start, [, fence, language]) => {
    const isEnd = line => /^ {0,3}(`+|~+)[ \t]*$/.test(line) && line.trim().startsWith(fence);
    const end = endOf(lines, start, line => !isEnd(line)); // an answer that is still coming has no end yet
    const indent = lines[start].indexOf(fence[0]);
    const code = lines.slice(start + 1, end).map(line => dedent(line, indent)).join("\n");
    const make = () => {
        const name = language.trim().split(/\s/)[0];
        const head = element("div", element("span", name), copyButton("Copy the code", () => code));
        head.className = "code-head";
        const pre = element("pre", element("code", code));
        const block = element("div", head, pre);
        block.className = "code";
        block.dir = "ltr";
        return block;
    };
    return [Math.min(end + 1, lines.length), make];
};

const formulaAt = (lines, start, [opening, sign]) => {
    const isClosed = lines[start].includes(FORMULA_END[sign], opening.length);
    const last = isClosed ? start : endOf(lines, start, line => line.trim() && !line.includes(FORMULA_END[sign]));
    const hasEnd = last < lines.length && lines[last].includes(FORMULA_END[sign]);
    const end = hasEnd ? last + 1 : last;
    const make = () => {
        const block = element("p", ...lines.slice(start, end).flatMap(line => [line, document.createElement("br")]));
        block.lastChild.remove();
        block.dir = "ltr";
        return block;
    };
    return isClosed && !lines[start].trimEnd().endsWith(FORMULA_END[sign]) ? null : [end, make];
};

const listAt = (lines, start, depth) => {
    const [, margin, first] = ITEM.exec(lines[start]);
    const isNumbered = first.length > 1, kind = first.at(-1);
    const items = [];
    let index = start, content = 0;
    for (; index < lines.length; index += 1) {
        const line = lines[index].replace(/^\t+/, tabs => "    ".repeat(tabs.length));
        const found = ITEM.exec(line), indent = line.search(/\S/);
        const isInside = items.length && indent >= Math.min(content, margin.length + 2);
        if (found && !isInside) {
            if (found[2].at(-1) !== kind || RULE.test(line)) break;
            const rest = line.slice(found[0].length);
            content = rest && found[0].length - found[1].length <= 6 ? found[0].length : found[1].length + 2;
            items.push([line.slice(Math.min(content, found[0].length))]);
        } else if (indent < 0) {
            const next = endOf(lines, index, following => !following.trim());
            if (next === lines.length || !goesOn(lines[next], margin.length, kind)) break;
            items.at(-1).push(...Array(next - index).fill(""));
            index = next - 1;
        } else if (isInside) {
            items.at(-1).push(dedent(line, content));
        } else if (items.at(-1).at(-1).trim() && !interrupts(lines, index)) {
            items.at(-1).push(line.trimStart()); // the paragraph goes on
        } else {
            break;
        }
    }
    const make = () => {
        const list = element(isNumbered ? "ol" : "ul", ...items.map(item => itemOf(item, depth)));
        if (isNumbered && first.slice(0, -1) !== "1") list.start = Number(first.slice(0, -1));
        return list;
    };
    return [index, make];
};

// Return whether a list goes on with this line, after an empty one.
const goesOn = (line, margin, kind) => line.search(/\S/) >= margin + 2 || ITEM.exec(line)?.[2].at(-1) === kind;

const itemOf = (lines, depth) => {
    const nodes = nodesOf(lines, depth + 1);
    if (nodes[0]?.tagName === "P") nodes.splice(0, 1, ...nodes[0].childNodes); // no space around a short item
    return element("li", ...nodes);
};

const isTable = (lines, start) =>
    lines[start].includes("|") &&
    start + 1 < lines.length &&
    DELIMITER.test(lines[start + 1]) &&
    cellsOf(lines[start]).length === cellsOf(lines[start + 1]).length;

const tableAt = (lines, start) => {
    const end = endOf(lines, start + 1, line => line.includes("|"));
    const make = () => {
        const alignments = cellsOf(lines[start + 1]).map(cell => `${+cell.startsWith(":")}${+cell.endsWith(":")}`);
        const sides = {"01": "end", "11": "center"};
        const row = (line, tag) => {
            const cells = cellsOf(line), last = alignments.length - 1;
            cells.splice(last, Infinity, cells.slice(last).join(" | ")); // loses no text if there are too many
            return element("tr", ...alignments.map((alignment, number) => {
                const cell = element(tag, renderInline(cells[number] ?? ""));
                if (sides[alignment]) cell.className = sides[alignment];
                return cell;
            }));
        };
        const body = lines.slice(start + 2, end).map(line => row(line, "td"));
        const table = element("table", element("thead", row(lines[start], "th")), element("tbody", ...body));
        const frame = element("div", table);
        frame.className = "table";
        return frame;
    };
    return [end, make];
};

const cellsOf = line => {
    const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
    return inner.split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));
};

// Return the first line after `start` for which `isInside` is not true.
const endOf = (lines, start, isInside) => {
    let end = start + 1;
    while (end < lines.length && isInside(lines[end], end)) end += 1;
    return end;
};

const dedent = (line, count) => line.slice(Math.min(Math.max(line.search(/\S|$/), 0), count));

const nodesOf = (lines, depth) => parse(lines, depth).map(({make}) => make());

// Return an element. The first letter of a text decides its direction.
const element = (tag, ...children) => {
    const made = document.createElement(tag);
    made.append(...children);
    if (/^(?:p|h\d|ul|ol|blockquote|table)$/.test(tag)) made.dir = "auto";
    return made;
};
